"""Training data, from files to batches of views.

`sources` list and read images, `order` shuffles them, `views` draws the parameters of each view, and `cpu` or `dali`
applies them. `batch` and `loader` make batches, and `watch` supervises the workers. `settings` is the configuration.
All randomness is a function of (seed, epoch, sample, view), see `random`.
"""
