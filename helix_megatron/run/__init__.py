"""Ranks as processes: started on this machine, told who they are, and watched while they run."""
