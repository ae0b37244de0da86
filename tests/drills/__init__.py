"""Drills: faults injected into tiny real training runs, and healthy runs beside them, for the doctor to tell apart."""
