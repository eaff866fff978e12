"""Programs that measure jmoe; `results/` has a JSON file for each run whose figures were kept."""
