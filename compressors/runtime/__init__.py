"""Compressed models that run in torch as their policy says: integer layers on the compiled kernels and on oneDNN.

`graph` is a traced model as plain data, `lower` says which operators a policy makes of it, `build` makes a module of them, and
`units` times them one by one.
"""
