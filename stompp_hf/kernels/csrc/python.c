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

/* What all such calls need: of torch, the names of what is asked of a tensor, and what nobody may have answered to. */
enum {
    TENSOR, EMPTY_LIKE, THREADS, AUTOCAST, CPU, IS_CPU, REQUIRES_GRAD, DTYPE, SHAPE, IS_CONTIGUOUS, DATA_PTR, VERSION,
    QUESTIONS, SHARED
};
/* What one of them needs: shape and dtype of x, an empty output, whether x is real, the layer's tensors, and then the
 * arguments of stompp_linear or stompp_real_linear. */
enum { X_SHAPE, X_DTYPE, LIKE, REAL, TENSORS, ARGUMENTS };
/* One of them: the dictionary that has it, its key there, itself (None: none), where it lies, and its version, or None for any; what
 * is no tensor lies at None. */
enum { HOME, KEY, ITSELF, PLACE, SEEN, PARTS };

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

/* Whether every question (a function, or an object and an attribute of it, and one answer) has that answer. */
static int is_quiet(PyObject *questions) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); i++) {
        PyObject *const *question = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(questions, i));
        if (!is(question[1] == Py_None ? PyObject_CallNoArgs(question[0]) : PyObject_GetAttr(question[0], question[1]),
                question[2]))
            return 0;
    }
    return 1;
}

/* Whether the layer's tensors are those that they were, where they were and what they were; an error may be set. */
static int are_there(PyObject *const *shared, PyObject *tensors) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
        PyObject *const *one = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(tensors, i));
        PyObject *found = PyDict_GetItemWithError(one[HOME], one[KEY]);
        if ((found ? found : Py_None) != one[ITSELF])
            return 0;
        if (one[PLACE] != Py_None && address(one[ITSELF], shared) != PyLong_AsLongLong(one[PLACE]))
            return 0;
        if (one[SEEN] != Py_None &&
            number(PyObject_GetAttr(one[ITSELF], shared[VERSION])) != PyLong_AsLongLong(one[SEEN]))
            return 0;
    }
    return 1;
}

/* Whether x is as the call was prepared for it, nobody listens, and the layer is as it was; an error may be set. */
static int fits(PyObject *const *shared, PyObject *const *own, PyObject *x) {
    if ((PyObject *)Py_TYPE(x) != shared[TENSOR] || !is(PyObject_GetAttr(x, shared[IS_CPU]), Py_True) ||
        !is(PyObject_GetAttr(x, shared[REQUIRES_GRAD]), Py_False) ||
        !is(PyObject_GetAttr(x, shared[DTYPE]), own[X_DTYPE]))
        return 0;
    PyObject *shape = PyObject_GetAttr(x, shared[SHAPE]);
    int same = shape && PyObject_RichCompareBool(shape, own[X_SHAPE], Py_EQ) == 1;
    Py_XDECREF(shape);
    return same && is(PyObject_CallMethodNoArgs(x, shared[IS_CONTIGUOUS]), Py_True) &&
           is(PyObject_CallOneArg(shared[AUTOCAST], shared[CPU]), Py_False) && is_quiet(shared[QUESTIONS]) &&
           are_there(shared, own[TENSORS]);
}

/* Whether an object is a tuple of tuples of a length. */
static int is_table(PyObject *rows, Py_ssize_t length) {
    int right = PyTuple_CheckExact(rows);
    for (Py_ssize_t i = 0; right && i < PyTuple_GET_SIZE(rows); i++)
        right = PyTuple_CheckExact(PyTuple_GET_ITEM(rows, i)) && PyTuple_GET_SIZE(PyTuple_GET_ITEM(rows, i)) == length;
    return right;
}

/* stompp_whole_call(shared, own, x): the output, or None where the call has to go another way. */
static PyObject *whole_call(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 3 || !PyTuple_CheckExact(arguments[0]) || !PyTuple_CheckExact(arguments[1]) ||
        PyTuple_GET_SIZE(arguments[0]) != SHARED || PyTuple_GET_SIZE(arguments[1]) < ARGUMENTS ||
        !is_table(PyTuple_GET_ITEM(arguments[0], QUESTIONS), 3) ||
        !is_table(PyTuple_GET_ITEM(arguments[1], TENSORS), PARTS))
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
    {"stompp_whole_call", (PyCFunction)(void (*)(void))whole_call, METH_FASTCALL, NULL},
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
