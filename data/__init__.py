"""What comes in: sample index, order, view parameters, and the backends that turn them into batches.

`index` lists the samples, `order` shuffles them, `views` draws what happens to each, `cpu` or `dali` makes it happen,
`loader` cuts it into batches, `watch` tells what is waited for. All randomness is a function of (seed, epoch, sample,
view), see `random`.
"""
