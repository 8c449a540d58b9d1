"""What ``bench`` measures and how: paired samples, fresh processes, and one module per engine."""
