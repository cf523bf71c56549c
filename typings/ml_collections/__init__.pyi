# For pyright: a field of a ConfigDict has the type that configs/base.py gives it, which the library's own annotations
# make a union of all.
from ml_collections import config_dict as config_dict
from ml_collections import config_flags as config_flags
from ml_collections.config_dict import ConfigDict as ConfigDict
