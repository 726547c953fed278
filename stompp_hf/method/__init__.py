"""The maths of StoMPP on plain tensors: schedules, masks, surrogate gradients, mixing, and the exact products."""
