/* The calls that are worth it, as functions of a Python module: ctypes needs a microsecond more for so many arguments.
 *
 * They take what the functions of the same name take, addresses as whole numbers or None. Where Python's headers are
 * missing, this file is empty, and all calls go through ctypes. Only what the stable ABI of Python 3.11 has is used, so
 * that one file serves all later Pythons; what has no global lock gets a file of its own.
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
int stompp_lane_linear(const float *x, const uint8_t *bits, const float *scale, int64_t scale_step, const float *shift,
                       int64_t shift_step, float *y, int64_t M, int64_t K, int64_t N, int threads);

#define MOST_ARGUMENTS 14
#define MOST_PARTS 32 /* of a tuple */

/* The items of a tuple of a length, borrowed: the stable ABI hands them out one by one. */
static int items(PyObject *tuple, Py_ssize_t count, PyObject **found) {
    if (!PyTuple_CheckExact(tuple) || PyTuple_Size(tuple) != count) {
        PyErr_Format(PyExc_TypeError, "a tuple of %zd is needed", count);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        found[i] = PyTuple_GetItem(tuple, i);
    return 1;
}

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

static int call_lane_linear(const int64_t *a) {
    return stompp_lane_linear(AT(float, 0), AT(uint8_t, 1), AT(float, 2), a[3], AT(float, 4), a[5], AT(float, 6), a[7],
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

static PyObject *lane_linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    return run(call_lane_linear, arguments, count, 11);
}

/* ---- a whole call of a layer, prepared for inputs of one shape: with one row, Python is most of the time ---- */

/* What all such calls need: of torch, the names of what is asked of a tensor, and what nobody may have answered to. */
enum {
    TENSOR, EMPTY_LIKE, THREADS, AUTOCAST, CPU, IS_CPU, REQUIRES_GRAD, DTYPE, SHAPE, IS_CONTIGUOUS, DATA_PTR, VERSION,
    QUESTIONS, SHARED
};
/* What one of them needs: shape and dtype of x, an empty output, what is called, the layer's tensors, and then the
 * arguments of that; threads are 0, or as many as torch has to have. */
enum { X_SHAPE, X_DTYPE, LIKE, KIND, TENSORS, ARGUMENTS };
static int (*const kinds[])(const int64_t *) = {call_linear, call_real_linear, call_lane_linear};
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
    return tensor == Py_None ? 0 : number(PyObject_CallFunctionObjArgs(shared[DATA_PTR], tensor, NULL));
}

/* Whether an answer is this very object, which something else keeps. */
static int is(PyObject *answer, PyObject *wanted) {
    Py_XDECREF(answer);
    return answer == wanted;
}

/* Whether every question (a function, or an object and an attribute of it, and one answer) has that answer. */
static int is_quiet(PyObject *questions) {
    PyObject *question[3];
    for (Py_ssize_t i = 0; i < PyTuple_Size(questions); i++) {
        if (!items(PyTuple_GetItem(questions, i), 3, question) ||
            !is(question[1] == Py_None ? PyObject_CallNoArgs(question[0]) : PyObject_GetAttr(question[0], question[1]),
                question[2]))
            return 0;
    }
    return 1;
}

/* Whether the layer's tensors are those that they were, where they were and what they were; an error may be set. */
static int are_there(PyObject *const *shared, PyObject *tensors) {
    PyObject *one[PARTS];
    for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); i++) {
        if (!items(PyTuple_GetItem(tensors, i), PARTS, one))
            return 0;
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
    return same && is(PyObject_CallMethodObjArgs(x, shared[IS_CONTIGUOUS], NULL), Py_True) &&
           is(PyObject_CallFunctionObjArgs(shared[AUTOCAST], shared[CPU], NULL), Py_False) &&
           is_quiet(shared[QUESTIONS]) && are_there(shared, own[TENSORS]);
}

/* stompp_whole_call(shared, own, x): the output, or None where the call has to go another way. */
static PyObject *whole_call(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    PyObject *shared[SHARED], *own[MOST_PARTS];
    Py_ssize_t parts = count == 3 ? PyTuple_Size(arguments[1]) : 0;
    if (parts < ARGUMENTS || parts > MOST_PARTS || !items(arguments[0], SHARED, shared) ||
        !items(arguments[1], parts, own) || PyTuple_Size(shared[QUESTIONS]) < 0 || PyTuple_Size(own[TENSORS]) < 0)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "two tuples and a tensor are needed");
    PyObject *x = arguments[2], *y = NULL;
    /* The function, since it is called often, and looking a method up takes as long as calling it; Tensor keeps it. */
    shared[DATA_PTR] = PyObject_GetAttr(shared[TENSOR], shared[DATA_PTR]);
    if (!shared[DATA_PTR])
        return NULL;
    Py_DECREF(shared[DATA_PTR]);
    if (fits(shared, own, x)) {
        int64_t kind = (int64_t)PyLong_AsLongLong(own[KIND]), a[MOST_ARGUMENTS];
        int wanted = kind ? 11 : 14, to = kind ? 6 : 8;
        if (kind < 0 || kind > 2 || !numbers(own + ARGUMENTS, parts - ARGUMENTS, wanted, a))
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "there is no such call");
        int64_t threads = number(PyObject_CallNoArgs(shared[THREADS]));
        if (a[wanted - 1] && a[wanted - 1] != threads && !PyErr_Occurred())
            Py_RETURN_NONE;
        a[wanted - 1] = threads;
        a[0] = address(x, shared);
        y = PyErr_Occurred() ? NULL : PyObject_CallFunctionObjArgs(shared[EMPTY_LIKE], own[LIKE], NULL);
        a[to] = y ? address(y, shared) : 0;
        if (!PyErr_Occurred() && compute(kinds[kind], a, wanted) == DONE)
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
    {"stompp_lane_linear", (PyCFunction)(void (*)(void))lane_linear, METH_FASTCALL, NULL},
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
