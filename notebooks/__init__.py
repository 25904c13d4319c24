"""The introduction to apollo-fuse as a notebook, what draws its figures, and what runs it."""
