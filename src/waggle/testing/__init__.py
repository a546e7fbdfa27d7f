"""For tests of waggle and of what is built on it: a machine of maps and programs, and packets as data."""
