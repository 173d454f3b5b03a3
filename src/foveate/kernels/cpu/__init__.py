"""Native CPU kernels: C++ behind a plain C interface, one shared library per instruction set.

`loader.library()` gives the one for this machine, or None with the reason in `loader.status()`. Nothing here is
imported, built or loaded before an operator asks for it.
"""
