"""The MPO trainer: a DeepSpeed loop, the reference store, evaluation per language and a command
line around `mpo_kernels`."""
