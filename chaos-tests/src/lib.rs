//! Real processes, real faults, checkers.
