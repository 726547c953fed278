"""What happens from step to step: the progression, the optimizer's part, distillation, metrics."""
