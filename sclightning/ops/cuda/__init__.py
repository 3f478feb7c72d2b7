"""CUDA C++ for Hopper (docs/cuda.md): launch.py has the operators, build.py makes the library from ../csrc."""
