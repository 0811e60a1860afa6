"""Which layer needs how many bits: measured one layer at a time (`measure`), then chosen for a budget (`allocate`)."""
