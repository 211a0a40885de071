"""Measure speed against what bounds it and against peers, alternately and in one run."""
