"""Several processes as one job: agreement at the start, one machine's part, SLURM. Imports torch only when used."""
