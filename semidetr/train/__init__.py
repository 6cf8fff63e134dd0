"Training: settings, checkpoints, metrics, the training loop. The package can be called: `semidetr.train(...)`"

import sys
from types import ModuleType


class _TrainPackage(ModuleType):
    "A package that is a function as well: `train` of `semidetr.train.api`"

    def __call__(self, *args, **kwargs):
        from semidetr.train.api import train

        return train(*args, **kwargs)

    @property
    def __signature__(self):
        import inspect
        from semidetr.train.api import train

        return inspect.signature(train)

    @property
    def __doc__(self):
        from semidetr.docs import full_text, module_names

        described = module_names('semidetr.train.api').get('train')
        return vars(self)['__doc__'] if described is None else full_text(described)


sys.modules[__name__].__class__ = _TrainPackage
