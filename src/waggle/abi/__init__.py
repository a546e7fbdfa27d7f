"""What Python and the BPF programs agree on: structs, enums, constants. Byte order lives in this layer only."""
