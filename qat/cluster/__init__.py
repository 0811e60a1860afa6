"""Several processes as one job: agreement at the start, one machine's part, SLURM. No training; torch only when used."""
