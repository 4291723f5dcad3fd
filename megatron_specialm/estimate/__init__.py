"""What settings ask of engine and machine, by arithmetic: capabilities, parameters, FLOPs, memory. Imports no torch."""
