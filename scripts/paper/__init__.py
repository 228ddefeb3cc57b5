"""Evidence for and against the paper's claims, written to docs/paper.md by scripts/reproduce_paper.py."""
