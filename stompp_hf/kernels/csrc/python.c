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
static int compute(int (*call)(const int64_t *), const int64_t *a, Py_ssize_t wanted) {
    int status;
    if ((double)a[wanted - 4] * (double)a[wanted - 3] * (double)a[wanted - 2] < WORTH_WAITING) {
        status = call(a);
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = call(a);
        Py_END_ALLOW_THREADS
    }
    return status;
}

static PyObject *run(int (*call)(const int64_t *), PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted) {
    int64_t a[MOST_ARGUMENTS];
    if (!numbers(arguments, count, wanted, a))
        return NULL;
    return PyLong_FromLong(compute(call, a, wanted));
}

static PyObject *linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    return run(call_linear, arguments, count, 14);
}

static PyObject *real_linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    return run(call_real_linear, arguments, count, 11);
}

/* ---- a whole call of a layer, prepared for inputs of one shape: with one row, Python is most of the time ---- */

/* What all prepared calls need: of torch, and the names of what is asked of a tensor. */
enum { TENSOR, EMPTY_LIKE, THREADS, AUTOCAST, CPU, IS_CPU, REQUIRES_GRAD, DTYPE, SHAPE, IS_CONTIGUOUS, DATA_PTR, SHARED };
/* What one of them needs: shape and dtype of x, an empty output, whether x is real, the layer's tensors, each as a
 * dictionary, its key there, what it is and where it lies, then the arguments of stompp_linear or stompp_real_linear. */
enum { X_SHAPE, X_DTYPE, LIKE, REAL, TENSORS, ARGUMENTS = TENSORS + 4 * 4 };

/* The answer of a call as a number; -1 with an error set where there is none. */
static int64_t number(PyObject *answer) {
    int64_t value = answer ? (int64_t)PyLong_AsLongLong(answer) : -1;
    Py_XDECREF(answer);
    return value;
}

static int64_t address(PyObject *tensor, PyObject *const *shared) {
    return tensor == Py_None ? 0 : number(PyObject_CallMethodNoArgs(tensor, shared[DATA_PTR]));
}

/* Whether an answer is this very object, which something else keeps. */
static int is(PyObject *answer, PyObject *wanted) {
    Py_XDECREF(answer);
    return answer == wanted;
}

/* Whether x is as the call was prepared for it, and the layer's tensors are where they were; an error may be set. */
static int fits(PyObject *const *shared, PyObject *const *own, PyObject *x) {
    if ((PyObject *)Py_TYPE(x) != shared[TENSOR] || !is(PyObject_GetAttr(x, shared[IS_CPU]), Py_True) ||
        !is(PyObject_GetAttr(x, shared[REQUIRES_GRAD]), Py_False) ||
        !is(PyObject_GetAttr(x, shared[DTYPE]), own[X_DTYPE]))
        return 0;
    PyObject *shape = PyObject_GetAttr(x, shared[SHAPE]);
    int same = shape && PyObject_RichCompareBool(shape, own[X_SHAPE], Py_EQ) == 1;
    Py_XDECREF(shape);
    if (!same || !is(PyObject_CallMethodNoArgs(x, shared[IS_CONTIGUOUS]), Py_True) ||
        !is(PyObject_CallOneArg(shared[AUTOCAST], shared[CPU]), Py_False))
        return 0;
    for (PyObject *const *of = own + TENSORS; of < own + ARGUMENTS; of += 4)
        if (PyDict_GetItemWithError(of[0], of[1]) != of[2] || address(of[2], shared) != PyLong_AsLongLong(of[3]))
            return 0;
    return 1;
}

/* stompp_prepared(shared, own, x): the output, or None where the call has to go another way. */
static PyObject *prepared(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 3 || !PyTuple_CheckExact(arguments[0]) || !PyTuple_CheckExact(arguments[1]) ||
        PyTuple_GET_SIZE(arguments[0]) != SHARED || PyTuple_GET_SIZE(arguments[1]) < ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "two tuples of their lengths and a tensor are needed");
    PyObject *const *shared = PySequence_Fast_ITEMS(arguments[0]), *const *own = PySequence_Fast_ITEMS(arguments[1]);
    PyObject *x = arguments[2], *y = NULL;
    if (fits(shared, own, x)) {
        int real = own[REAL] == Py_True, wanted = real ? 11 : 14, to = real ? 6 : 8;
        int64_t a[MOST_ARGUMENTS];
        if (!numbers(own + ARGUMENTS, PyTuple_GET_SIZE(arguments[1]) - ARGUMENTS, wanted, a))
            return NULL;
        a[0] = address(x, shared);
        a[wanted - 1] = number(PyObject_CallNoArgs(shared[THREADS]));
        y = PyErr_Occurred() ? NULL : PyObject_CallOneArg(shared[EMPTY_LIKE], own[LIKE]);
        a[to] = y ? address(y, shared) : 0;
        if (!PyErr_Occurred() && compute(real ? call_real_linear : call_linear, a, wanted) == DONE)
            return y;
    }
    Py_XDECREF(y);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"stompp_prepared", (PyCFunction)(void (*)(void))prepared, METH_FASTCALL, NULL},
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
