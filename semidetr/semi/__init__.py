"Methods that live in chapters of their own add themselves to `methods.METHODS`."

from . import dense_teacher, policies, soft_teacher  # noqa: F401
