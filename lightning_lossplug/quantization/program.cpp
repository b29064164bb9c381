// Functions called one after the other, with their arguments' addresses filled in: no Python between them.

#include <cstdint>
#include <cstring>

struct Address {
    int64_t at, base, offset;  // arguments[at] becomes bases[base] + offset
};

struct Step {
    void (*function)(const void *);
    int64_t at;  // where its arguments begin
};

struct Program {
    int64_t size, addresses, steps, room;
    const uint8_t *arguments;  // of all steps, [size]
    const Address *address;
    const Step *step;
};

extern "C" {

int64_t lossplug_program_bytes() { return sizeof(Program); }

// memory: [room] for what one step leaves to another, then [size] for arguments. Calls may run beside each other.
void lossplug_run(const Program *p, void *x, void *y, uint8_t *memory) {
    uint8_t *const bases[3] = {(uint8_t *)x, (uint8_t *)y, memory}, *arguments = memory + p->room;
    std::memcpy(arguments, p->arguments, p->size);
    for (int64_t i = 0; i < p->addresses; i++) {
        const Address &a = p->address[i];
        const uint8_t *value = bases[a.base] + a.offset;
        std::memcpy(arguments + a.at, &value, sizeof value);
    }
    for (int64_t i = 0; i < p->steps; i++) p->step[i].function(arguments + p->step[i].at);
}
}
