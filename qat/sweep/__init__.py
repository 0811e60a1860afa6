"""Many runs: which settings (space, study), how each is started (jobs), and the loop that watches them (driver)."""
