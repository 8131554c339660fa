//! The simulation as a whole.
