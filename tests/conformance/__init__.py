"""CPython's own tests on uringloop; a package, so that its files can import each other."""
