"""Linear algebra on one thread, where the work of one core is promised."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """The BLAS of numpy and of SciPy on one thread, in all of this process, and as many as before afterwards.

    The matrices here are small. More threads gain them nothing, and wait for each other by spinning: where another process is
    busy, a factorisation costs many times the CPU time. Sums in one order make the same trials on any number of cores, too.
    """
    with _pools().limit(limits=1, user_api="blas"):
        yield


@cache
def _pools() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  (loads a BLAS of its own, which the controller has to see)

    return ThreadpoolController()
