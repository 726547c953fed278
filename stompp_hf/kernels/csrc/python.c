/* The calls that are worth it, as functions of a Python module: ctypes needs a microsecond more for so many arguments.
 *
 * They take what the functions of the same name take, addresses as whole numbers or None. Where Python's headers are
 * missing, this file is empty, and all calls go through ctypes.
 */
#if defined(__has_include)
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#define WORTH_WAITING (1 << 22) /* products that take longer than handing Python's lock over */

int stompp_linear(const void *x, int x_dtype, const float *threshold, const uint8_t *bits, const float *scale,
                  int64_t scale_step, const float *shift, int64_t shift_step, void *y, int y_dtype, int64_t M,
                  int64_t K, int64_t N, int threads);
int stompp_real_linear(const float *x, const uint8_t *bits, const float *scale, int64_t scale_step, const float *shift,
                       int64_t shift_step, float *y, int64_t M, int64_t K, int64_t N, int threads);

#define MOST_ARGUMENTS 14

/* Every argument as a number of 64 bits; an address is one, and None is 0. */
static int numbers(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted, int64_t *found) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", wanted, count);
        return 0;
    }
    for (Py_ssize_t i = 0; i < wanted; i++)
        found[i] = arguments[i] == Py_None ? 0 : (int64_t)PyLong_AsLongLong(arguments[i]);
    return !PyErr_Occurred();
}

#define AT(type, i) ((type *)(uintptr_t)a[i])

static int call_linear(const int64_t *a) {
    return stompp_linear(AT(void, 0), (int)a[1], AT(float, 2), AT(uint8_t, 3), AT(float, 4), a[5], AT(float, 6), a[7],
                         AT(void, 8), (int)a[9], a[10], a[11], a[12], (int)a[13]);
}

static int call_real_linear(const int64_t *a) {
    return stompp_real_linear(AT(float, 0), AT(uint8_t, 1), AT(float, 2), a[3], AT(float, 4), a[5], AT(float, 6), a[7],
                              a[8], a[9], (int)a[10]);
}

/* Sizes M, K, N and threads are the last four. */
static PyObject *run(int (*call)(const int64_t *), PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted) {
    int64_t a[MOST_ARGUMENTS];
    int status;
    if (!numbers(arguments, count, wanted, a))
        return NULL;
    if ((double)a[wanted - 4] * (double)a[wanted - 3] * (double)a[wanted - 2] < WORTH_WAITING) {
        status = call(a);
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = call(a);
        Py_END_ALLOW_THREADS
    }
    return PyLong_FromLong(status);
}

static PyObject *linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    return run(call_linear, arguments, count, 14);
}

static PyObject *real_linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    return run(call_real_linear, arguments, count, 11);
}

static PyMethodDef methods[] = {
    {"stompp_linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, NULL},
    {"stompp_real_linear", (PyCFunction)(void (*)(void))real_linear, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#if defined(Py_GIL_DISABLED)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&module); }

#endif
#endif
