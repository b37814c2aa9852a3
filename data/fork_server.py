"""Imported first by the fork server of data workers: they leave the rank's process group.

torchrun and a terminal signal the whole group when training shall stop. The rank then goes on to the end of its step
and saves, for which it needs its workers; they end when it closes them, or when it is gone.
"""

import os

os.setsid()
