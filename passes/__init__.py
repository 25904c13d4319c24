"""The passes of the partition and fusion phases, one a file, each from one IR to the next."""
