"""The operator graph of a run: every operator, tensor and collective of every rank, at full size, without GPU.

`trace` runs the model's own code as one rank after the other, on fake tensors; `build` joins the ranks by
their collectives; `checks` holds the graph against what it must be; `dot` and `html` draw it. `command` is
`helix graph`.
"""
