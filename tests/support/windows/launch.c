/*
 * launch.exe REQUEST RESULT STDIN STDOUT STDERR: starts one process exactly as asked, with these
 * files as its streams, and notes its exit code.
 *
 * REQUEST holds UTF-8 texts, each ended by a NUL: the command line, the directory to run in,
 * then NAME=value entries to add to the environment. RESULT gets the exit code in decimal.
 * Why it is there: Wine escapes the quotes of a command line that comes from Unix, and Unix
 * keeps 8 of the 32 bits of an exit code (9009 reads as 49). This passes both on unchanged. Python
 * does not start in Wine on a stream that Unix opened, so the files are opened here.
 *
 * What it starts is in a job that ends with this process, so that killing launch.exe after
 * a time limit leaves nothing running. It exits with 0, or 125 if it could not do its work.
 */
#define WIN32_LEAN_AND_MEAN
#define _WIN32_WINNT 0x0601
#include <windows.h>
#include <shellapi.h>
#include <stdio.h>
#include <stdlib.h>
#include <wchar.h>

#define CANNOT_LAUNCH 125
#define LONGEST_REQUEST 1000000

static int fail(const char *what)
{
    fprintf(stderr, "launch: cannot %s (error %lu)\n", what, GetLastError());
    return CANNOT_LAUNCH;
}

/* The texts of the request, one after the other, with an empty one at the end. */
static wchar_t *read_request(const wchar_t *path)
{
    static char bytes[LONGEST_REQUEST];
    static wchar_t texts[LONGEST_REQUEST + 2];
    FILE *file = _wfopen(path, L"rb");
    size_t size;
    if (file == NULL)
        return NULL;
    size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    return MultiByteToWideChar(CP_UTF8, 0, bytes, (int)size, texts, LONGEST_REQUEST) ? texts : NULL;
}

static wchar_t *next(wchar_t *text)
{
    return text + wcslen(text) + 1;
}

/* Add the NAME=value entries to this process' environment, which its child inherits. */
static void set_variables(wchar_t *entry)
{
    while (*entry) {
        wchar_t *following = next(entry);
        wchar_t *equals = wcschr(entry, L'=');
        if (equals != NULL) {
            *equals = L'\0';
            SetEnvironmentVariableW(entry, equals + 1);
        }
        entry = following;
    }
}

/* A job whose processes end when its last handle is closed, which only this process holds. */
static HANDLE job_that_ends_with_us(void)
{
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION limits = {0};
    HANDLE job = CreateJobObjectW(NULL, NULL);
    limits.BasicLimitInformation.LimitFlags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE;
    SetInformationJobObject(job, JobObjectExtendedLimitInformation, &limits, sizeof limits);
    return job;
}

/* A file that the child reads, or writes anew. */
static HANDLE stream(const wchar_t *path, BOOL is_read)
{
    SECURITY_ATTRIBUTES inherited = {sizeof inherited, NULL, TRUE};
    return CreateFileW(path, is_read ? GENERIC_READ : GENERIC_WRITE,
                       FILE_SHARE_READ | FILE_SHARE_WRITE, &inherited,
                       is_read ? OPEN_EXISTING : CREATE_ALWAYS, FILE_ATTRIBUTE_NORMAL, NULL);
}

static BOOL start_and_wait(wchar_t *command_line, const wchar_t *directory, wchar_t **streams,
                           DWORD *code)
{
    STARTUPINFOW startup = {0};
    PROCESS_INFORMATION child;
    HANDLE job = job_that_ends_with_us();
    startup.cb = sizeof startup;
    startup.dwFlags = STARTF_USESTDHANDLES;
    startup.hStdInput = stream(streams[0], TRUE);
    startup.hStdOutput = stream(streams[1], FALSE);
    startup.hStdError = stream(streams[2], FALSE);
    /* Suspended until it is in the job, so that nothing it starts is outside. */
    if (!CreateProcessW(NULL, command_line, NULL, NULL, TRUE, CREATE_SUSPENDED, NULL, directory,
                        &startup, &child))
        return FALSE;
    AssignProcessToJobObject(job, child.hProcess);
    ResumeThread(child.hThread);
    WaitForSingleObject(child.hProcess, INFINITE);
    return GetExitCodeProcess(child.hProcess, code);
}

int main(void)
{
    int count = 0;
    wchar_t **arguments = CommandLineToArgvW(GetCommandLineW(), &count);
    wchar_t *command_line, *directory;
    DWORD code = 0;
    FILE *result;

    if (arguments == NULL || count != 6)
        return fail("start: give REQUEST, RESULT, STDIN, STDOUT and STDERR");
    command_line = read_request(arguments[1]);
    if (command_line == NULL)
        return fail("read the request");
    directory = next(command_line);
    set_variables(next(directory));
    if (!start_and_wait(command_line, directory, arguments + 3, &code))
        return fail("start the command");
    result = _wfopen(arguments[2], L"w");
    if (result == NULL || fprintf(result, "%lu", code) < 0 || fclose(result) != 0)
        return fail("write the result");
    return 0;
}
