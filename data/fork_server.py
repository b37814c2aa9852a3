"""Moves the fork server of data workers out of the rank's process group; the server imports this module first.

To stop training, torchrun and a terminal signal the whole process group. The rank then completes its step and saves,
for which it needs its workers. They end when the rank closes them or is gone.
"""

import os

os.setsid()
