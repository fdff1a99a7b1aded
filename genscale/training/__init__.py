"""The Lightning side: module, EMA, optimizers, checkpoints, callbacks."""
