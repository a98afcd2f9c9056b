"""Tests of uringloop: sentences about behaviour, on real sockets and kernels, for every monitor."""
