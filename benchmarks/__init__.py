"""What `make bench` measures: every figure beside its limit or its peer, in the same run."""
