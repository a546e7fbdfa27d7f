"""What the data path reports: drops, flows, counters."""
