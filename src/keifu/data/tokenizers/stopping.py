"""Work of the `tokenizers` library that Ctrl-C ends. The library does not look for signals while it works."""

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def left_by_a_stop(work: Callable[[], Result]) -> Result:
    """Return the result of a function that does not look for signals. Ctrl-C leaves it to a thread that ends with the
    program.

    Outside the main thread, where no signal arrives, the function is called directly.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    results, errors = list[Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # also a panic of the library's, which is no Exception
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]
