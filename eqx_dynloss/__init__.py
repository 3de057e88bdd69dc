"""Dynamical loss functions for JAX and Equinox: class weights that oscillate during training.

`schedule` holds the weights as a function of the step, `loss` the losses that take them, `models` the papers' networks,
`train` a training run as pure functions, and `ensemble` many of them as one compiled program.
"""
