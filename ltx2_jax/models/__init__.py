"""Networks: arrays in, arrays out. No I/O, no mesh-axis names, no knowledge of noise schedules."""
