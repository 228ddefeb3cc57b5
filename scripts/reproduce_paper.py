#!/usr/bin/env python3
"""Write docs/paper.md and its pictures: the paper's claims, measured and simulated. See --help."""

from paper.command import main

if __name__ == "__main__":
    main()
