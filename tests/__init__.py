"""Tests of uringloop: sentences about behaviour, on real sockets and real kernels, the same for every monitor."""
