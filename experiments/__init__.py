"""Figures for a paper, one script each: `python -m experiments.<name> -o <folder>`. They read run folders only."""
