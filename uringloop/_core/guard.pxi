# The entries of a GLib source. CPython runs signal handlers when a Python function begins, before any `try` in it; what
# they raise there would be PyGObject's to print, and GLib would drop the source. Native code does not begin so.
#
# Promise: no exception leaves these functions.

def prepare_source(attachment):
    """GLib is about to sleep. Nothing is due: what is makes a descriptor readable."""
    try:
        attachment.before_sleep()
    except BaseException as exc:
        end_attachment(attachment, exc)
    return False, -1


def dispatch_source(attachment, callback, args):
    """A descriptor is readable."""
    try:
        attachment.dispatch()
    except BaseException as exc:
        end_attachment(attachment, exc)
    return True  # GLib.SOURCE_CONTINUE


cdef int end_attachment(attachment, exc) except -1:
    for _ in range(2):  # a second interrupt may come at its first step
        try:
            attachment.end(exc)
            break
        except BaseException:
            pass
    return 0
