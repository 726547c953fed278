/* Work on several threads: in the team of OpenMP that torch has brought along, or in threads made for one call.
 *
 * A second OpenMP runtime would have threads of its own, which wait in loops and take the cores from torch's.
 */
#include "kernels.h"

#include <stdatomic.h>
#include <stddef.h>

#ifndef PRODUCTS_A_THREAD
#define PRODUCTS_A_THREAD (1 << 22) /* fewer are done before another thread has begun; a test may say fewer */
#endif
#define MOST_THREADS 256

typedef struct {
    Task task;
    void *context;
    int64_t count;
    atomic_llong next;
    atomic_int slots;
} Job;

typedef void (*Team)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static Team team;

/* GOMP_parallel of the runtime that is loaded, or NULL. */
EXPORT void stompp_set_team(void *gomp_parallel) { *(void **)&team = gomp_parallel; }

static void work(void *data) {
    Job *job = data;
    int slot = atomic_fetch_add(&job->slots, 1);
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->count;)
        job->task(job->context, i, slot);
}

#if !defined(_WIN32)
#include <pthread.h>

static void *worker(void *data) {
    work(data);
    return NULL;
}

static void run_new_threads(Job *job, int threads) {
    pthread_t made[MOST_THREADS];
    int count = 0;
    while (count < threads - 1 && pthread_create(&made[count], NULL, worker, job) == 0)
        count++;
    work(job);
    for (int i = 0; i < count; i++)
        pthread_join(made[i], NULL);
}
#else
static void run_new_threads(Job *job, int threads) {
    (void)threads;
    work(job);
}
#endif

void stompp_run(Task task, void *context, int64_t count, int threads) {
    Job job = {.task = task, .context = context, .count = count};
    atomic_init(&job.next, 0);
    atomic_init(&job.slots, 0);
    threads = (int)smaller(threads, count);
    if (threads <= 1)
        work(&job);
    else if (team)
        team(work, &job, (unsigned)threads, 0);
    else
        run_new_threads(&job, threads);
}

int stompp_threads_for(double products, int threads) {
    double enough = products / PRODUCTS_A_THREAD;
    threads = enough < threads ? (int)enough : threads;
    return threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
}
