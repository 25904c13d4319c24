"""Code generation: from the kernel IR to source text, and from source text to a library."""
