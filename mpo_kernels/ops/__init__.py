"""Autograd functions over the device functions of a backend."""
