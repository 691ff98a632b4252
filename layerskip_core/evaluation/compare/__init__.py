"""Several runs side by side: their measurements, with intervals over the runs of each label."""
