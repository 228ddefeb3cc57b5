"""Predict time and memory of every layout of a model on a cluster, and rank them. Nothing here imports torch.

`models` and `clusters` say what is planned for. `search` enumerates `layouts`, and `refusals` says which cannot
be. `score` and `inference` predict one from `operators` (rooflines), `collective_time` (measured tables),
`schedule` (pipelines, event by event) and `memory`. `ranking`, `explain`, `plot`, `write` and `perfetto` show
predictions; `scripts/validate_planner.py` compares them with published runs. All figures are simulated.
"""
